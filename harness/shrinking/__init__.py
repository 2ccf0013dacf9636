"""The simplest case that still fails."""
