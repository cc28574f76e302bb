"""The basis of every room: errors, atomic files, plans as values, running a model without side effects."""
