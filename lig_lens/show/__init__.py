"""Tables, figures and the explorer."""
