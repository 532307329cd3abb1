"""What converting a layer is worth, measured."""
