package identity

import (
	"context"

	"github.com/weirmesh/weir/proxy/mtls"
)

// Source is the identity for handshakes. One that has expired is what it is, until there
// is another: who shakes hands says so, and waits for nothing.
func (h *Holder) Source() mtls.Source { return source{h} }

type source struct{ holder *Holder }

// Current implements mtls.Source.
func (s source) Current() *mtls.Identity {
	if now := s.holder.current.Load(); now != nil {
		return &now.shaking
	}
	return nil
}

// Wait implements mtls.Source.
func (s source) Wait(ctx context.Context) (*mtls.Identity, error) {
	now, err := s.holder.Wait(ctx)
	if err != nil {
		return nil, err
	}
	return &now.shaking, nil
}
