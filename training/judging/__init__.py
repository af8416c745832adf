"""How good a trained network is and where it is wrong: counts, calibration, shifts, sizes, and pictures of them."""
