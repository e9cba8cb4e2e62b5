"""What a module is: its graph of layers, neuron groups and operators."""
