"""What a model costs and how good it is: size, work, time and accuracy, measured."""
