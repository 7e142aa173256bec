"""What finished runs say: rows, statistics over seeds, sentences, ours beside the printed. No torch in here."""
