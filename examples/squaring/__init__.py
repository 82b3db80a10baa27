"""Networks that square their inputs: what activations show, what is read."""
