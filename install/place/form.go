package place

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/weirmesh/weir/install/conflist"
)

// Form is how the plugin is chained.
type Form string

// Auto is a drop-in only if the runtime itself says that it has loaded one. No
// version tells: distributions build runtimes with another libcni, and what is on
// the disk may not be what runs. Until the runtime was heard to say so, and on
// every runtime that cannot be asked, it is the entry, which all of them read. An
// entry that is there is kept: a drop-in beside it could not be told from it.
const (
	Auto   Form = "auto"
	DropIn Form = "dropin" // on the word of who installs
	Entry  Form = "entry"
)

// Forms are what Keeper.Form may be.
var Forms = []Form{Auto, DropIn, Entry}

const (
	// loadTime is what the runtime gets to notice a new file, before it is taken
	// to read no drop-ins: milliseconds, but on a node that is starting everything.
	loadTime = 5 * time.Second
	// askTime is what it gets to answer. containerd runs STATUS of every plugin
	// first, which takes seconds on a node that is starting everything.
	askTime  = 5 * time.Second
	askAgain = 20 * time.Millisecond
)

// errNotLoaded: the runtime has loaded its configuration, without our drop-in.
var errNotLoaded = errors.New("the runtime does not read drop-ins")

// formState is what Auto has found out.
type formState struct {
	settled Form      // DropIn or Entry; empty: nothing yet
	dropIn  string    // the file, while there is one
	asked   time.Time // the runtime, last
}

// chain heals in the form that is wanted, or found to work.
func (k *Keeper) chain(ctx context.Context) (Healed, error) {
	want := k.Form
	if want == Auto {
		want = k.choose(ctx)
	}
	c := k.Chain
	c.DropIn = want == DropIn
	healed, err := c.Heal()
	k.form.dropIn = ""
	if healed.DropIn {
		k.form.dropIn = healed.File
	}
	if err != nil || !healed.DropIn || k.Form != Auto {
		return healed, err
	}
	if !healed.Changed && time.Since(k.form.asked) < pollChain {
		return healed, nil
	}
	proof := k.prove(ctx, healed)
	if errors.Is(proof, errChanged) {
		return healed, proof // to be healed first
	}
	k.form.asked = time.Now()
	switch {
	case proof == nil:
		k.form.settled = DropIn
		return healed, nil
	case ctx.Err() != nil:
		return healed, nil
	case k.form.settled == DropIn && !errors.Is(proof, errNotLoaded):
		return healed, nil // it did: one that is restarting does not answer
	}
	k.say("form", slog.LevelInfo, "chaining as an entry of the primary's list: "+proof.Error())
	k.form = formState{settled: Entry}
	c.DropIn = false
	return c.Heal()
}

// choose says what Auto tries.
func (k *Keeper) choose(ctx context.Context) Form {
	switch {
	case k.form.settled != "":
		return k.form.settled
	case k.Loaded == nil:
		return Entry
	}
	primary, _, err := findPrimary(k.Chain.Dir, time.Now())
	if err != nil || !primary.info.DropIns {
		return Entry // nothing to decide yet
	}
	if primary.entered() == nil {
		k.form.settled = Entry
		return Entry
	}
	// One that does not answer now is not waited for: meanwhile nothing is chained.
	if _, err := k.ask(ctx); err != nil {
		k.say("form", slog.LevelInfo, "chaining as an entry of the primary's list: "+err.Error())
		k.form.settled = Entry
		return Entry
	}
	return DropIn
}

// prove waits for the runtime to say that it has loaded the drop-in. If that, or
// the list that it belongs to, is changed meanwhile, nothing is proved.
func (k *Keeper) prove(ctx context.Context, healed Healed) error {
	began := time.Now()
	for {
		types, err := k.ask(ctx)
		if err == nil && slices.Contains(types, conflist.PluginType) {
			return nil
		}
		if !k.Chain.has(healed) {
			return errChanged
		}
		if err == nil {
			err = fmt.Errorf("%w: it has loaded %q", errNotLoaded, types)
		}
		if time.Since(began) > loadTime || ctx.Err() != nil {
			return err
		}
		time.Sleep(askAgain)
	}
}

// has says whether a drop-in is there still, and the primary's.
func (c Chain) has(healed Healed) bool {
	primary, _, err := findPrimary(c.Dir, time.Now())
	if err != nil || c.dropIn(primary.info.Name) != healed.File {
		return false
	}
	_, err = os.Lstat(healed.File)
	return err == nil
}

func (k *Keeper) ask(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	return k.Loaded(ctx)
}
