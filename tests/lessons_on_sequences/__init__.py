"""A lesson's decoder with attention in each framework's own words, and how its models are called there."""
