"""What the MONAI model zoo asks of a bundle: checks of its directory, and its style of code and configs."""
