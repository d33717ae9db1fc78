"""Figures: how fast, how exact, and the plots that show it."""
