"""Tables, pictures and pages made from result files; nothing here measures."""
