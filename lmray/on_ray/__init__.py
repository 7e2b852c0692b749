"""The one floor that imports Ray: adapters that give programs their surroundings, file for file."""
