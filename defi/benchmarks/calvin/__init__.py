"""CALVIN, and the built-in play table, which is judged the same: chains of tasks."""
