// Package rotation decides when: renewal times as pure functions, and a scheduler that wakes whoever is due.
// Every time is injected; simulated years run in milliseconds.
package rotation
