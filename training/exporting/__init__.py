"""A trained network for people without this project: weights, graphs, model cards, and a page to try it on."""
