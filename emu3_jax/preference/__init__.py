"""Preference data from the model itself: samples, rewards, and pairs of the best and the worst."""
