"""What only containers need: how the image links the project and how a container proves that it is alive."""
