// Stand-in for qupath.lib.images.servers.RotatedImageServer (QuPath 0.2 and later).
package qupath.lib.images.servers

class RotatedImageServer extends TransformingImageServer {
    RotatedImageServer(Object server) { super(server) }
}
