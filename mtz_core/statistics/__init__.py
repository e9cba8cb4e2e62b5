"""What is measured on calibration data: second moments and sensitivities."""
