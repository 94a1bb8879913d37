//go:build soak

package rotation

import "testing"

func TestNoValidatorEverMeetsALeafThatItCannotVerifyInTenThousandWorlds(t *testing.T) {
	modelSeeds(t, 10_000)
}
