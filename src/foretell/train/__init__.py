"""From a model alone to a trained drafter: data it writes itself, features, trainer."""
