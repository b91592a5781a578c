"""Prices of houses, learnt on several ranks: what a project with training code looks like."""
