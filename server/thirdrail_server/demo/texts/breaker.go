package breaker

import (
	"errors"
	"fmt"
	"sync"
)

var ErrOpen = errors.New("breaker is open")

type Breaker struct {
	mu       sync.Mutex
	failures int
	limit    int
}

func (b *Breaker) Do(work func() error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failures >= b.limit {
		return ErrOpen
	}
	if err := work(); err != nil {
		b.failures++
		return fmt.Errorf("attempt %d: %w", b.failures, err)
	}
	b.failures = 0
	return nil
}
