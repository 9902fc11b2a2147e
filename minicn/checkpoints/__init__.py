"""Weights on disk: files read without trust, published layouts and names, loading, saving and converting of models."""
