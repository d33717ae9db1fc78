"""HAMburger: macro steps that write several tokens from one state."""
