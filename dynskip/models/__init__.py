"""What a decoder is: its layers, its matrices, its checkpoint."""
