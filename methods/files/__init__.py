"""Files of weights, read safely: headers checked before a tensor is believed, tensors mapped and never copied whole."""
