"""Training: the small encoder, heads on cached features, and the bundled model made of both."""
