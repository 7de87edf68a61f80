"""This room is what a person types and sees: it imports the library's face, nothing imports it, and only it prints."""
