// A TURN server by pion/turn that takes the credentials a portal derives from a relay's secret.
//
// It prints "ready" when it serves and ends with its input.
package main

import (
	"crypto/sha256"
	"encoding/base64"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strings"

	"github.com/pion/turn/v5"
)

const realm = "firezone"

func main() {
	listen := flag.String("listen", "", "`address` to serve and to relay from")
	secret := flag.String("secret", "", "the stamp_secret")
	flag.Parse()

	socket, err := net.ListenPacket("udp", *listen)
	exitOn(err)
	host := socket.LocalAddr().(*net.UDPAddr).IP
	server, err := turn.NewServer(turn.ServerConfig{
		Realm: realm,
		AuthHandler: func(request *turn.RequestAttributes) (string, []byte, bool) {
			expiry, salt, ok := strings.Cut(request.Username, ":")
			digest := sha256.Sum256([]byte(expiry + ":" + *secret + ":" + salt))
			password := base64.RawStdEncoding.EncodeToString(digest[:])
			return request.Username, turn.GenerateAuthKey(request.Username, realm, password), ok
		},
		PacketConnConfigs: []turn.PacketConnConfig{{
			PacketConn:            socket,
			RelayAddressGenerator: &turn.RelayAddressGeneratorStatic{RelayAddress: host, Address: host.String()},
		}},
	})
	exitOn(err)
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	exitOn(server.Close())
}

func exitOn(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
