package decide

// maxTypos is how far a known annotation may be from what was written to be
// worth suggesting.
const maxTypos = 3

// nearest finds the known annotation closest to name, or "" if none is close.
// Names are without prefix.
func nearest(name string) string {
	best, bestDistance := "", maxTypos+1
	consider := func(known string) {
		if len(name) > len(known)+maxTypos {
			return // also keeps the work small: a name may be of any length
		}
		if d := distance(name, known); d < bestDistance {
			best, bestDistance = known, d
		}
	}
	for _, a := range annotations {
		// A short name is near to everything that is short.
		if len(a.name) > 2*maxTypos {
			consider(a.name)
		}
	}
	return best
}

// distance counts the bytes to insert, drop or replace to get from a to b
// (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
