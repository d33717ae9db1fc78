"""Hydra and Hydra++: heads that read the guesses before theirs."""
