"""The measuring instrument: what is measured (`registry`), how (`measure`), against which version (`compare`), in which step (`steps`)."""
