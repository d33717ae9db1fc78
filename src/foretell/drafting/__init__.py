"""What methods share while they draft and learn; a method itself is one file in `drafters`."""
