"""The verbs on parameter trees."""
