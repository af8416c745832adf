"""Image classifiers by name, and the wrapper that lets Composer train them."""
