package main

import (
	"context"
	"fmt"
	"time"
)

// rootsStory replaces the root again and again under load: A by A and B, then B alone, then by C, then by D, while every
// Envoy is served incrementally.
func rootsStory(d *demo) ([]step, func(), func()) {
	d.delta = true
	r := newRotating(d)
	steps := []step{
		{"an offline root A for example.org", r.makeRootA},
		{"clusters east and west join under A, and learn the key of each other's log", r.join},
		{"a server and an agent in each cluster", r.start},
		{"registrations", d.register},
		{"a frontend and a backend Envoy in each cluster", d.startEnvoys},
		{"load both ways, on fresh connections and on connections held open", r.load},
	}
	for _, name := range []string{"B", "C", "D"} {
		steps = append(steps, step{"the root is replaced by root " + name, func(ctx context.Context) (string, error) { return r.replaceWhole(ctx, name) }})
	}
	return append(steps, step{"the load ends", r.endLoad}), func() {}, func() {}
}

// replaceWhole replaces the root in both clusters, until the one before is gone.
func (r *rotating) replaceWhole(ctx context.Context, name string) (string, error) {
	began, before := time.Now(), r.newest(r.east)
	made, err := r.steal(ctx, before)
	if err != nil {
		return "", err
	}
	if err := r.everyEnvoy(ctx, made, true); err != nil {
		return "", err
	}
	next, err := r.makeRoot(ctx, name, "root-"+name)
	if err != nil {
		return "", err
	}
	shown, err := r.replaceBy(ctx, next)
	if err != nil {
		return "", err
	}
	if err := r.removedAndRefused(ctx, before.under, next, made); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s; root %s was removed after %.1f s, and what was made under it is refused by all four Envoys", shown, before.under.name, time.Since(began).Seconds()), nil
}
