"""Phases and beats, back."""
