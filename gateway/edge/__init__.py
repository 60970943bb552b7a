"""The doors: inference, admin, health. Each turns a request into a call of what lies below, and errors into answers."""
