"""Callbacks for any Lightning Trainer."""
