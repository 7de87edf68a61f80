"""This room turns text into token ids and holds the texts and the demo model that ship; it never imports torch."""
