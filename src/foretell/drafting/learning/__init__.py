"""How drafters are trained: heads, a decoder layer, a student of the backbone."""
