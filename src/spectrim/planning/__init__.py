"""From a rule and an analysis to a plan: forms and ranks under one budget."""
