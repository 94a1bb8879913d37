//go:build real

package main

import "testing"

func TestTheVaultDemoPasses(t *testing.T) { passes(t, vaultStory) }
