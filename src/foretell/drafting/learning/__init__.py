"""How drafters are trained: modules and their losses, draft heads, a decoder layer, fine-tuning."""
