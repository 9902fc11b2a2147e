"""Weights on disk: files read without trusting them, published layouts and names; models loaded, saved and converted."""
