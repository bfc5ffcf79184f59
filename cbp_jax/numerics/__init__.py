"""What the transformations share: random keys and noise, exact rounding, checks of arguments."""
