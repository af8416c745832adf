"""Turns a recipe into a trained model and its results folder."""
