"""This room turns text into token ids and holds the bundled texts and demo model; it never imports torch."""
