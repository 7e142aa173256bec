"""What finished runs say: rows, statistics over seeds, sentences, and ours next to the printed. No torch in here."""
