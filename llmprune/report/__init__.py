"""Showing what a run did."""
